"""Comparisons of PEFT methods: what a YAML file asks for, its runs, and tables and plots of their results."""
