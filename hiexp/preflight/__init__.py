"""``hiexp doctor CONFIG``: what would go wrong with a run, found before it costs anything."""
