"""klnorm in training frameworks: one module each, imported by name, which imports its framework."""
