"""The stages in order, each a value: Scenario -> Toolkit -> HeadMask -> SlicePlan -> files -> proof -> report.

`compiling` ends at the mask, `building` at a published artifact; `evidence` and `judging` settle which texts may choose
and which may only judge; `reporting`, `verifying` and `benching` start from what a build came to (`outcome`).
"""
