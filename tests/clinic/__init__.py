"""The clinic: short trainings, sick and healthy ones, that the health check is judged by."""
