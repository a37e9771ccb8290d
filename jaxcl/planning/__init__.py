"""`jaxcl plan`: what a configuration needs of hardware that is not here."""
