"""``launch.py gpu-report``: what FlowPrefill promises, measured on one card by one command.

``command`` runs the ``phases`` one after the other, each in a process of its own (``worker``), and puts what they found
into one JSON (``document``) and one page (``page``).
"""
