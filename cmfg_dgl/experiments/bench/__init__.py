"""The comparison of all methods: what is run, what came out, and its tables and pages."""
