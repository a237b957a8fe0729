"""One file per benchmark: a loader for the formats people have, and a pure scorer of predictions."""
