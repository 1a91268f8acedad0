"""What is measured on a model: activations, likelihoods, divergences, samples under steering."""
