"""What a first use imports: each model and each way in a process of its own, beside plain torch."""
