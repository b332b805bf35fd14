"""What train_accelerate.py is made of: building, loading, gradients, evaluation, checkpoints, the folder of a run."""
