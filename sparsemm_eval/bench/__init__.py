"""How fast it is. Needs torch and matplotlib only, so that it runs on a bare GPU machine."""
