"""klnorm in training frameworks: one module for each, which imports its framework and has to be imported by name."""
