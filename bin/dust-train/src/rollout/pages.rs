//! The pages of the key/value cache: who holds which, counted.

use anyhow::Result;
use dust_kernels::{Backend, attention::PAGE};

use crate::model::{LayerCache, Model};

/// The cache of all layers, and the free list of its pages.
pub(super) struct Pages<B: Backend> {
    pub cache: Vec<LayerCache<B>>,
    free: Vec<u32>,
    holders: Vec<u32>,
}

impl<B: Backend> Pages<B> {
    pub fn new(device: &B, model: &Model<B>, pages: usize) -> Result<Self> {
        let elements = pages * PAGE * model.heads().kv_width();
        let cache = (0..model.config.layers)
            .map(|_| Ok((device.zeros(elements)?, device.zeros(elements)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            cache,
            free: (0..pages as u32).rev().collect(),
            holders: vec![0; pages],
        })
    }

    /// Takes `n` pages, or none where fewer are free.
    pub fn take(&mut self, n: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(n)?;
        let taken = self.free.split_off(rest);
        for &page in &taken {
            self.holders[page as usize] = 1;
        }
        Some(taken)
    }

    /// Another holder of each page.
    pub fn share(&mut self, pages: &[u32]) {
        for &page in pages {
            self.holders[page as usize] += 1;
        }
    }

    /// One holder fewer of each page; a page without holders is free.
    pub fn release(&mut self, pages: &[u32]) {
        for &page in pages {
            let holders = &mut self.holders[page as usize];
            *holders -= 1;
            if *holders == 0 {
                self.free.push(page);
            }
        }
    }

    /// Copies the first `tokens` tokens of page `from` to page `to`, in every layer.
    pub fn copy(
        &mut self,
        device: &B,
        from: u32,
        to: u32,
        tokens: usize,
        width: usize,
    ) -> Result<()> {
        let start = |page: u32| page as usize * PAGE * width;
        for (k, v) in &mut self.cache {
            for buffer in [k, v] {
                device.copy_within(buffer, start(from), start(to), tokens * width)?;
            }
        }
        Ok(())
    }
}
