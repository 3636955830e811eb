"""How good a model is: one file per metric."""
