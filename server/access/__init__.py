"""Who may use the server: API keys and their scopes, budgets, owners of generations, and the hosts and origins of
browsers. It knows nothing of models, profiles or routes beyond their paths."""
