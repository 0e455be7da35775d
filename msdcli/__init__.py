"""Multi-student distillation: one conditional diffusion teacher, K one-step students."""
