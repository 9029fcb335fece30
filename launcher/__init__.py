"""Where to run: one launch plan, three backends (this machine, SLURM, hosts over ssh), one command on every node.

    command line ──▶ LaunchPlan ──▶ RUN/plan.json ──▶ on every node: python -m launcher node --plan RUN/plan.json
                                                                      │ finds its rank and interface; checks; then
                                                                      ▼
                                                      accelerate launch … -m simclr_dist.train CONFIG key=value …

Nodes that another scheduler has started make the same plan each, compare it, and become one training: `node CONFIG`.

The launcher never imports torch, so that it answers at once on a login node. A training started by hand with
`accelerate launch -m simclr_dist.train` needs nothing from here.
"""
