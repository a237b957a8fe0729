"""Model classes; run.py looks a configuration's "class" up here."""
