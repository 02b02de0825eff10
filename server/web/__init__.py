"""What every HTTP service of the project needs. Knows no engine, no registry and no job."""
