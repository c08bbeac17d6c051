"""What a recipe costs on GPUs that need not be there: memory, time, layouts. No torch."""
