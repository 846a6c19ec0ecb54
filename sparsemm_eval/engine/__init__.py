"""Models that lmms-eval sees. Import what you need from the modules: this stays light."""
