//! Rewards of a ranking and losses that train scores to rank.

use crate::error::check_len;
use crate::{Device, Error, Result};

/// What a ranking is rewarded for; labels are relevance, 0 or 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RankingReward {
    /// Share of the (correct, incorrect) pairs in the right order.
    #[default]
    PairwiseAccuracy,
    /// Normalised discounted cumulative gain: gain `2^y - 1`, discount `log2(rank + 1)`.
    Ndcg,
    /// 1 if the item ranked first is correct.
    Selection,
}

/// Rewards and listwise losses.
///
/// ```
/// # fn main() -> dust_kernels::Result<()> {
/// use dust_kernels::{Cpu, Device, ranking::{Ranking, RankingReward}};
/// let cpu = Cpu::new();
/// // Two rankings of three items of which only item 2 is correct; the second names item 0 twice.
/// let order = cpu.upload(&[0u32, 2, 1, 0, 0, 2])?;
/// let labels = cpu.upload(&[0.0f32, 0.0, 1.0, 0.0, 0.0, 1.0])?;
/// let mut rewards = cpu.zeros(2)?;
/// let kind = RankingReward::PairwiseAccuracy;
/// cpu.ranking_reward(2, 3, kind, -1.0, &order, &labels, &mut rewards)?;
/// assert_eq!(cpu.download(&rewards)?, [0.5, -1.0]);
/// # Ok(())
/// # }
/// ```
pub trait Ranking: Device {
    /// Rewards of `rankings` rankings of `items` items each.
    ///
    /// `order` `[rankings, items]` lists item indices from best to worst, `labels`
    /// `[rankings, items]` holds each item's label (0 or 1) by item index. A row of `order` that is
    /// no permutation of `0..items` gets `invalid`. A row of labels without contrast has no pairs:
    /// pairwise accuracy and NDCG are 1 where all are correct and 0 where none is.
    ///
    /// # Errors
    /// Short buffers, no items, more than 64 items.
    fn ranking_reward(
        &self,
        rankings: usize,
        items: usize,
        reward: RankingReward,
        invalid: f32,
        order: &Self::Buf<u32>,
        labels: &Self::Buf<f32>,
        rewards: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// Plackett-Luce negative log-likelihood of `order` under `scores` (ListMLE, Xia et al. 2008):
    /// `sum_i lse(s[order[i..]]) - s[order[i]]`, per list, and its gradient by item, both scaled by
    /// `weight`.
    ///
    /// # Errors
    /// Short buffers; an order that is no permutation; on a CUDA device more than 4096 items.
    fn plackett_luce_loss(
        &self,
        lists: usize,
        items: usize,
        weight: f32,
        scores: &Self::Buf<f32>,
        order: &Self::Buf<u32>,
        loss: &mut Self::Buf<f32>,
        dscores: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// Pairwise logistic loss (RankNet, Burges et al. 2005): mean over the pairs `y_i > y_j` of
    /// `ln(1 + exp(s_j - s_i))`, per list, and its gradient by item, both scaled by `weight`. A list
    /// without contrast has loss and gradient 0.
    ///
    /// # Errors
    /// Short buffers; on a CUDA device more than 4096 items.
    fn pairwise_logistic_loss(
        &self,
        lists: usize,
        items: usize,
        weight: f32,
        scores: &Self::Buf<f32>,
        labels: &Self::Buf<f32>,
        loss: &mut Self::Buf<f32>,
        dscores: &mut Self::Buf<f32>,
    ) -> Result<()>;
}

/// Items of the longest ranking that is rewarded.
const MAX_ITEMS: usize = 64;

/// The rule of a ranking's length.
pub(crate) fn check_items(items: usize) -> Result<()> {
    if (1..=MAX_ITEMS).contains(&items) {
        return Ok(());
    }
    Err(Error::invalid(
        "ranking_reward",
        format!("`items` is {items}, it must be 1 to {MAX_ITEMS}"),
    ))
}

/// What [`Ranking::ranking_reward`] asks of its arguments; the lengths in their order.
pub(crate) fn check_ranking_reward(
    rankings: usize,
    items: usize,
    [order, labels, rewards]: [usize; 3],
) -> Result<()> {
    const OP: &str = "ranking_reward";
    check_items(items)?;
    let len = rankings.saturating_mul(items);
    check_len(OP, "order", order, len)?;
    check_len(OP, "labels", labels, len)?;
    check_len(OP, "rewards", rewards, rankings)
}

/// The lengths that a loss of `lists` lists needs; `target` is the name and length of what the
/// scores are held against.
pub(crate) fn check_list_loss(
    op: &'static str,
    lists: usize,
    items: usize,
    scores: usize,
    target: (&'static str, usize),
    [loss, dscores]: [usize; 2],
) -> Result<()> {
    let len = lists.saturating_mul(items);
    check_len(op, "scores", scores, len)?;
    check_len(op, target.0, target.1, len)?;
    check_len(op, "loss", loss, lists)?;
    check_len(op, "dscores", dscores, len)
}
