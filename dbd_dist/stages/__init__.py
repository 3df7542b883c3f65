"""The training stages. Each takes what it needs as plain arguments and knows neither Ray, nor files, nor the truth."""
