"""Everything that needs a GPU, in one command: build, compare, measure, profile, test, check memory.

``make gpu`` runs it with the Python that is there and downloads nothing. It takes at most BUDGET seconds, 540
by default. Each stage has a limit, and the next one starts whatever became of it. All goes to one folder,
RESULTS: summary.md, written anew after every stage, and at most seven files more, which grow while the stages
run. The exit status is 0 if nothing failed, 1 if something did, 2 without a GPU.

``--dry-run`` goes through every stage without a GPU, on small operands: the kernels for a GPU run on the CPU,
as in the tests, and the tools of a GPU are said to be missing. Its times say nothing.
"""
