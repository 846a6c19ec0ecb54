"""How the tiny models were trained: in a checkout alone, not in the wheel."""
