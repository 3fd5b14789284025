"""What a model is: its parameters, its device, its digest, how it is called."""
