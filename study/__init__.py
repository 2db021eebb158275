"""The low-resource study: does KL-Norm help where labels are few? What was planned: study/PLAN.md."""
