"""What the neighbours reach: federated rounds over the air, universal perturbations, dynamic scale training."""
