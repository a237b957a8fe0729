"""How answers are read and compared."""
