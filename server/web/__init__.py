"""What every HTTP service of the project is made of; knows no engine, no registry and no job."""
