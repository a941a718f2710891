"""Step 1: a torch module becomes torch-dialect IR, with its weights beside it."""
