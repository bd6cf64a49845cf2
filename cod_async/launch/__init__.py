"""Starting and supervising the processes of a run.

``local`` runs everything on this machine: ``supervisor`` keeps children alive, ``run_folder`` guards and
describes the folder, ``phases`` holds what happens before and after training.
"""
