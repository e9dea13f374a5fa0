"""Matrix products on codes and scales alone: what ``real_quant=True`` runs."""
