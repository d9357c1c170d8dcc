"""What the neighbouring methods reach: federated rounds over the air, universal perturbations, dynamic scale training."""
