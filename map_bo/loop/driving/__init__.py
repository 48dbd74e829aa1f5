"""What a driver does step by step: on which workers, and with which examples."""
