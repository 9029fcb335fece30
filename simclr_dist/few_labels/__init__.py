"""What h is worth with few labels: fine-tuning, distillation, recipes."""
