"""What train_accelerate.py is made of: objective, evaluation, progress and the folder of a run."""
