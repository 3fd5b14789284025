"""What a model is: its parameters, its device, its digest; small models and data sets to try."""
