"""Rules side by side: baselines, operating points, bootstrap, plans."""
