"""How the embedded backbone is made: model, packed batches, vision pre-training, language training."""
