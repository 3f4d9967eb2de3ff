"""Training: one loop, on Lightning Fabric, for every stage that changes weights."""
