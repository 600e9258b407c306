"""A model run on from a site with another activation: what all causal stages share."""
