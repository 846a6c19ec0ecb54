"""Which heads see: visual scores and what follows from them."""
