"""Speed against plain implementations of the published algorithms; the plain ones are the tests' oracles as well."""
