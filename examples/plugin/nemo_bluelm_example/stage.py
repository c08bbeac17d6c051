"""A stage: next-token training that learns nothing from tokens which are most likely noise."""

from nemo_bluelm.train.job import NextToken

CAP = 9.0  # nats; of a vocabulary of 16,384, guessing costs 9.7


class Capped(NextToken):
    """As ``NextToken``; a token's loss counts up to ``CAP``, and has no gradient above it."""

    def module(self, optimizer):
        from nemo_bluelm.runtime.plugin import BlueLM  # imports NeMo, which a command's --help needn't wait for
        from nemo_bluelm.train.losses import TokenLoss

        class CappedLoss(TokenLoss):
            def forward(self, batch, row_losses):
                return super().forward(batch, row_losses.clamp(max=CAP))

        return BlueLM(self.recipe, self.tokenizer.image, CappedLoss, optimizer)
