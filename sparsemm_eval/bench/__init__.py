"""How fast it is. Needs torch, transformers, pandas and matplotlib, as bare GPU machines have."""
