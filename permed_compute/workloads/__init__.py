"""The two shapes of work, and the domains that have them."""
