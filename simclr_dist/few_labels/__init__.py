"""Classifiers from few labels: fine-tuning, distillation, recipes."""
