"""Getting a job onto machines: rented Pods, and what starts the processes there (job.py, machines.py)."""
