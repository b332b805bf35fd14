"""What train_accelerate.py is made of: building, loading, a step's gradients, evaluation, checkpoints, a run's folder."""
