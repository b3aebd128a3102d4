"""The ``elsa`` command, above the other packages: what a command needs is imported when it is called.

A server has ``elsa_sparse`` without what prunes, and still packs, unpacks and inspects.
"""
