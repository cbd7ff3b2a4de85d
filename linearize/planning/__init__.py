"""What to rewrite and how, as data: config, plan, and what a converted model carries of them."""
