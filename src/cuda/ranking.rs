//! Launches of `kernels/ranking.cu`.

use super::launch::{Arg, Fault, Grid, Kernels, dim};
use super::{Cuda, CudaBuffer};
use crate::ranking::{Ranking, RankingReward, check_items, check_list_loss, check_ranking_reward};
use crate::{Buffer, Error, Result};
use cudarc::driver::sys::{CUdeviceptr, CUstream};

/// Threads of a list's block.
const THREADS: usize = 64;
const WARP: usize = 32;
/// Rankings of a block of rewards: one a warp.
const RANKINGS: usize = 4;
/// Items of the longest list that has a loss: what shared memory holds.
const MAX_ITEMS: usize = 4096;

fn check_list(op: &'static str, items: usize) -> Result<i32> {
    if items > MAX_ITEMS {
        let rule = format!("`items` is {items}, on a CUDA device it may not be above {MAX_ITEMS}");
        return Err(Error::invalid(op, rule));
    }
    dim(op, "items", items)
}

impl Kernels {
    /// [`Ranking::ranking_reward`] on device pointers.
    ///
    /// # Errors
    /// No items, more than 64 items; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `order` holds
    /// `rankings * items` u32, `labels` as many f32, `rewards` `rankings` f32; `rewards` overlaps
    /// neither, and all live until the work is done.
    pub unsafe fn ranking_reward(
        &self,
        stream: CUstream,
        rankings: usize,
        items: usize,
        reward: RankingReward,
        invalid: f32,
        order: CUdeviceptr,
        labels: CUdeviceptr,
        rewards: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "ranking_reward";
        check_items(items)?;
        let kind = match reward {
            RankingReward::PairwiseAccuracy => 0i32,
            RankingReward::Ndcg => 1,
            RankingReward::Selection => 2,
        };
        let grid = Grid::new(rankings.div_ceil(RANKINGS), RANKINGS * WARP);
        let (rankings, items) = (dim(OP, "rankings", rankings)?, dim(OP, "items", items)?);
        let args: [&dyn Arg; 7] = [
            &rankings, &items, &kind, &invalid, &order, &labels, &rewards,
        ];
        // SAFETY: by the caller.
        unsafe { self.launch(stream, OP, grid, &args) }
    }

    /// [`Ranking::plackett_luce_loss`] on device pointers.
    ///
    /// A list whose order is no permutation is left alone: an item that does not exist is noted in
    /// `outside`, as an element of `order`; one that stands twice in `repeated`, as an element of
    /// how often each item stands there, with limit 2.
    ///
    /// # Errors
    /// More than 4096 items; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `scores` and `dscores` hold
    /// `lists * items` f32, `order` as many u32, `loss` `lists` f32; what is written overlaps
    /// nothing, and all live until the work is done. The faults are as their documentation says.
    pub unsafe fn plackett_luce_loss(
        &self,
        stream: CUstream,
        lists: usize,
        items: usize,
        weight: f32,
        scores: CUdeviceptr,
        order: CUdeviceptr,
        loss: CUdeviceptr,
        dscores: CUdeviceptr,
        outside: Fault,
        repeated: Fault,
    ) -> Result<()> {
        const OP: &str = "plackett_luce_loss";
        let grid = Grid::new(lists, THREADS).shared(24 * items + 4 * items.div_ceil(32));
        let items = check_list(OP, items)?;
        let args: [&dyn Arg; 8] = [
            &items, &weight, &scores, &order, &outside, &repeated, &loss, &dscores,
        ];
        // SAFETY: by the caller.
        unsafe { self.launch(stream, OP, grid, &args) }
    }

    /// [`Ranking::pairwise_logistic_loss`] on device pointers.
    ///
    /// # Errors
    /// More than 4096 items; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `scores`, `labels` and
    /// `dscores` hold `lists * items` f32, `loss` `lists`; what is written overlaps nothing, and
    /// all live until the work is done.
    pub unsafe fn pairwise_logistic_loss(
        &self,
        stream: CUstream,
        lists: usize,
        items: usize,
        weight: f32,
        scores: CUdeviceptr,
        labels: CUdeviceptr,
        loss: CUdeviceptr,
        dscores: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "pairwise_logistic_loss";
        let grid = Grid::new(lists, THREADS).shared(8 * items);
        let items = check_list(OP, items)?;
        let args: [&dyn Arg; 6] = [&items, &weight, &scores, &labels, &loss, &dscores];
        // SAFETY: by the caller.
        unsafe { self.launch(stream, OP, grid, &args) }
    }
}

impl Ranking for Cuda {
    fn ranking_reward(
        &self,
        rankings: usize,
        items: usize,
        reward: RankingReward,
        invalid: f32,
        order: &CudaBuffer<u32>,
        labels: &CudaBuffer<f32>,
        rewards: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        check_ranking_reward(rankings, items, [order.len(), labels.len(), rewards.len()])?;
        let turn = self.turn("ranking_reward", &[order, labels, rewards])?;
        let (order, labels, rewards) = (order.address(), labels.address(), rewards.address());
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.ranking_reward(
                turn.stream,
                rankings,
                items,
                reward,
                invalid,
                order,
                labels,
                rewards,
            )
        }
    }

    fn plackett_luce_loss(
        &self,
        lists: usize,
        items: usize,
        weight: f32,
        scores: &CudaBuffer<f32>,
        order: &CudaBuffer<u32>,
        loss: &mut CudaBuffer<f32>,
        dscores: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        const OP: &str = "plackett_luce_loss";
        let target = ("order", order.len());
        let outputs = [loss.len(), dscores.len()];
        check_list_loss(OP, lists, items, scores.len(), target, outputs)?;
        let mut turn = self.turn(OP, &[scores, order, loss, dscores])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.plackett_luce_loss(
                turn.stream,
                lists,
                items,
                weight,
                scores.address(),
                order.address(),
                loss.address(),
                dscores.address(),
                turn.fault("order"),
                turn.fault("occurrences in order"),
            )
        }
    }

    fn pairwise_logistic_loss(
        &self,
        lists: usize,
        items: usize,
        weight: f32,
        scores: &CudaBuffer<f32>,
        labels: &CudaBuffer<f32>,
        loss: &mut CudaBuffer<f32>,
        dscores: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        const OP: &str = "pairwise_logistic_loss";
        let target = ("labels", labels.len());
        let outputs = [loss.len(), dscores.len()];
        check_list_loss(OP, lists, items, scores.len(), target, outputs)?;
        let turn = self.turn(OP, &[scores, labels, loss, dscores])?;
        let (scores, labels) = (scores.address(), labels.address());
        let (loss, dscores) = (loss.address(), dscores.address());
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.pairwise_logistic_loss(
                turn.stream,
                lists,
                items,
                weight,
                scores,
                labels,
                loss,
                dscores,
            )
        }
    }
}
